"""jentropy: policy entropy in reinforcement learning with verifiable rewards, in pure JAX."""
