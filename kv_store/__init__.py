"""Documents on disk and in memory; knows no attention and no ranks."""

from kv_store.clusters import ClusterTables
from kv_store.device import ResidentDocument
from kv_store.document import Damage, Document
from kv_store.errors import (
    DocumentBusy,
    DocumentDamaged,
    DocumentExists,
    DocumentIncomplete,
    DocumentNotFound,
    FormatUnsupported,
    InvalidName,
    InvalidSegment,
    ResumeRefused,
    StoreError,
    StoreFull,
    StoreNotWritable,
)
from kv_store.holding import Holding
from kv_store.layout import CLUSTER_TENSORS, Layout
from kv_store.listing import DocumentInfo
from kv_store.load import load_clusters, load_resident
from kv_store.manifest import DocumentParams, FileEntry, Manifest
from kv_store.segments import SegmentFiles
from kv_store.store import Store
from kv_store.writer import DocumentWriter

__all__ = [
    "Store",
    "Document",
    "DocumentInfo",
    "DocumentParams",
    "DocumentWriter",
    "FileEntry",
    "Manifest",
    "SegmentFiles",
    "Damage",
    "Layout",
    "CLUSTER_TENSORS",
    "Holding",
    "ResidentDocument",
    "ClusterTables",
    "load_clusters",
    "load_resident",
    "StoreError",
    "InvalidName",
    "InvalidSegment",
    "DocumentNotFound",
    "DocumentIncomplete",
    "DocumentExists",
    "DocumentBusy",
    "DocumentDamaged",
    "ResumeRefused",
    "FormatUnsupported",
    "StoreNotWritable",
    "StoreFull",
]
