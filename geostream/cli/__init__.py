"""Define the command line ``geostream``."""
