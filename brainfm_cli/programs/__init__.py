"""What runs outside Python: containers, workflows, schedulers."""
