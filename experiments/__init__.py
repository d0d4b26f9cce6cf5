"""One file per question; run them as `python -m experiments.<name>`."""
