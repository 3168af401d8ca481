"""The live monitor: a page, the stream that feeds it and the terminal's view, and what each number on them means."""
