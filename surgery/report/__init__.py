"""Reports that open offline: pages, pictures and tables of what comparisons, evaluations and sweeps found."""
