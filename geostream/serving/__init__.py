"""Serve the page that answers "where is this photo?", with its HTTP interface."""
