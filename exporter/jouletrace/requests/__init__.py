"""Requests: who used the energy. Records come in, joules per request, model and tenant come out."""
