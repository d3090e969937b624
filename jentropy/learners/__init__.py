"""Second models with parameters and an optimizer of their own: each file is one, a factory of `base.Learner`."""
