"""The HTTP face of the daemon: metrics, health and the landing page."""
