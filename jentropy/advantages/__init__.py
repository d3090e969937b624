"""Advantage estimators: each file is one method, a factory of `base.Estimator`. They see one whole rollout."""
