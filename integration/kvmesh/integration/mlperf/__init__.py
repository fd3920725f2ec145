"""MLPerf's scenarios: its own LoadGen in front of a live mesh, its arrivals in the simulator."""
