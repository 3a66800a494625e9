"""The object store: one folder of objects at a URL, S3's configuration, and errors that say what to do."""

from geostream.store.store import NAME, ObjectInfo, Store, check_name, table_bytes

__all__ = ["NAME", "ObjectInfo", "Store", "check_name", "table_bytes"]
