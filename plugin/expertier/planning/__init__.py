"""What the machine allows: memory limits, storage speed, and the plan that follows."""
