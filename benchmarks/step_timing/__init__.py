"""What `step_time.py` is made of."""
