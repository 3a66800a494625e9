"""Other streaming libraries, each set up as its own documentation recommends."""
