"""Brain MRI and language: a masked encoder of scans, tuned for what hospitals ask."""
