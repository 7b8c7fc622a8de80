"""Tools around the studies: sampling, evaluations, and the paper's experiments in one plan."""
