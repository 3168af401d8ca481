"""The files that deploy jouletrace: chart, manifests, compose."""
