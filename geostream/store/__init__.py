"""Read and write objects below one URL, on S3, in a local folder or on another object store."""

from geostream.store.store import NAME, ObjectInfo, Store, check_name, table_bytes, table_of

__all__ = ["NAME", "ObjectInfo", "Store", "check_name", "table_bytes", "table_of"]
