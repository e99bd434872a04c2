"""Services with a run's metrics: TensorBoard, Weights & Biases, MLflow, Trackio, users' own."""
