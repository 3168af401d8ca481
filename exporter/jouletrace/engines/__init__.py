"""What feeds records: sockets, and the client that programs use to send them."""
