"""Training engine for satellite time series: see README.md, then `engine/trainer.py`."""
