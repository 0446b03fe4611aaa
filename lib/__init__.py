"""Deep equilibrium models versus bilevel learning, for regularized inverse problems."""
