"""The system under test, PPO on mixture-of-experts models with megatron-core, and its one-process reference."""
