"""Sources of the compiled kernels, installed as hpctrain.kernels: cpu/ builds hpctrain._native."""
