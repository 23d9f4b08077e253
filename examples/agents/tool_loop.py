"""An agent of one's own without HTTP: asks the policy, has the environment answer its calls, until it answers."""

from polyturn.agents.agent_play import AgentEpisode


async def play(episode: AgentEpisode) -> None:
    """The built-in loop, written out."""
    messages = list(episode.messages)
    while True:
        reply = await episode.reply(messages)
        found = await episode.step(reply)
        if found is None:
            return
        messages += [reply.to_message(), *found]
