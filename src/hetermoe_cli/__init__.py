"""hetermoe: plan and train Mixture-of-Experts models on clusters that mix GPU generations."""

__version__ = "0.1.0"
