"""Group level: pack finished participants, and further datasets, into one cohort with its quality table."""
