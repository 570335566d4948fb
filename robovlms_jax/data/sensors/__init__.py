"""Data halves of sensors; importing the package registers them."""

from robovlms_jax.data.sensors import robot_state as robot_state
from robovlms_jax.data.sensors.base import Readings as Readings
from robovlms_jax.data.sensors.base import Span as Span
from robovlms_jax.data.sensors.base import make as make
from robovlms_jax.data.sensors.base import register as register
