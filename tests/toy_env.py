"""What processes started by the tests import: toy environments, and a way to run a script in such a process."""

import os
import runpy
import sys

import gymnasium as gym
import numpy as np


class ToyEnv(gym.Env):
    """A point in the plane, to be driven to the origin: reward -|x|, terminated within 0.15 of it. Both are functions
    of the next observation alone, so that tests can recompute them from it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-2.0, 2.0, (2,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.x = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return self.x, {}

    def step(self, action):
        self.x = (self.x + 0.1 * np.clip(action, -2, 2)).astype(np.float32)
        return self.x, self.reward(self.x), self.terminated(self.x), False, {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)

    @staticmethod
    def reward(x):
        return -np.linalg.norm(x, axis=-1)

    @staticmethod
    def terminated(x):
        return np.linalg.norm(x, axis=-1) < 0.15


class ToyGoalEnv(gym.Env):
    """A point on a line and a goal: reward 1 and info["success"] where they meet, never terminated."""

    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    observation_space = gym.spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return {"observation": np.zeros(1), "achieved_goal": self.x.copy(), "desired_goal": np.ones(1)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.zeros(1)
        return self.observe(), {}

    def step(self, action):
        self.x = self.x + 0.5 * np.asarray(action, np.float64)
        success = bool(abs(self.x[0] - 1) < 0.1)
        return self.observe(), float(success), False, False, {"success": success}


class MatrixEnv(ToyEnv):
    """Its observation is no vector."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2, 3))

    def reset(self, *, seed=None, options=None):
        return np.zeros((2, 3), np.float32), {}


class BareEnv(gym.Env):
    """No render_mode, and a time limit of its own."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), 1.0, False, self.t == 5, {}


class UnboundedEnv(BareEnv):
    observation_space, action_space = gym.spaces.Box(-8.0, 8.0, (3,)), gym.spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode


TOY = gym.envs.registration.EnvSpec("Toy-v0", entry_point="toy_env:ToyEnv", max_episode_steps=50)
TOY_GOAL = gym.envs.registration.EnvSpec("ToyGoal-v0", entry_point="toy_env:ToyGoalEnv", max_episode_steps=10)
BARE = gym.envs.registration.EnvSpec("Bare-v0", entry_point="toy_env:BareEnv")


def run_script(argv: list[str], environ: dict[str, str], folder: str, log: str) -> None:
    """`python argv` in `folder`, its output into the file `log`; for a child process with torch imported already."""
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
