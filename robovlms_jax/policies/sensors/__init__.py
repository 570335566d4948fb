"""Importing the package registers every sensor."""

from robovlms_jax.policies.sensors import audio, depth, imu, lidar, pointcloud, robot_state, vector

__all__ = ["audio", "depth", "imu", "lidar", "pointcloud", "robot_state", "vector"]
