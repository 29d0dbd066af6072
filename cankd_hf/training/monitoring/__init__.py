"""What can be watched while a run trains: names for trackers, the bar, interval means, waiting for data, energy."""
