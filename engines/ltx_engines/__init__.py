"""What an engine is: the contract that exporter and runtime both read."""
