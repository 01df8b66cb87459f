"""lungseg: maps and numbers of lung pathology from unlabelled CT scans."""

__version__ = "0.1.0"
