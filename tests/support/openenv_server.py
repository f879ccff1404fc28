"""A server of the real OpenEnv, in which one guesses a number. Run it with a port."""

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class GuessAction(Action):
    """Guess the number."""

    number: int


class GuessObservation(Observation):
    text: str = ""


class Guess(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: Any = None, episode_id: Any = None, secret: int = 5, **columns: Any) -> GuessObservation:
        self.secret = secret
        return GuessObservation(text="Guess.")

    def step(self, action: GuessAction, timeout_s: Any = None, **options: Any) -> GuessObservation:
        if action.number < 0:
            raise ValueError("too small")
        right = action.number == self.secret
        return GuessObservation(text="right" if right else "no", done=right, reward=1.0 if right else -0.5)

    @property
    def state(self) -> State:
        return State(episode_id="one", step_count=0)


if __name__ == "__main__":
    app = create_fastapi_app(Guess, GuessAction, GuessObservation, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
