"""What a run is: configured, trained and stored."""
