"""Many clips in one command: jobs, who makes them, and what of them is on the disk already."""
