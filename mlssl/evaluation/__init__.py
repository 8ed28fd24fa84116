"""How good a backbone is: metrics, features and the probes on them."""
