"""The HTTP face of the daemon: metrics, health and the live monitor."""
