"""Runs as jobs of a Ray cluster: what is sent along, how the head is asked, how its log is followed."""
