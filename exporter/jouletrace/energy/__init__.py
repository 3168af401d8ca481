"""Power to joules. Pure: no clock, no thread, no driver; time comes in as epoch nanoseconds."""
