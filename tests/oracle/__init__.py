"""Independent references for the tests: transformers, moshi, a hub server, brute force."""
