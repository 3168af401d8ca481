"""The Debian package and its service in a real systemd."""
