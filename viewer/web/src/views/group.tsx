/** The episodes of one task side by side, and where they part. */

import { useState } from "preact/hooks";

import type { GroupDetail, GroupMember, RunSummary } from "../api";
import { useAnswer } from "../client";
import { count, number } from "../format";
import { useKeys } from "../keyboard";
import { MessageView } from "../message";
import { episodeLink, Facts, OutcomeChip, Problems, Ready, Signed } from "../parts";
import { useRoute } from "../router";
import { Inline } from "../visible_text";

export function GroupView({ run, id }: { run: RunSummary; id: string }) {
  const { query } = useRoute();
  const step = query.get("step");
  const asked = useAnswer("/api/group", {
    run: run.id, group: id, set: query.get("set") ?? undefined, step: step === null ? undefined : Number(step),
  });
  return <Ready of={asked}>{(group) => <Group run={run} group={group} />}</Ready>;
}

function Group({ run, group }: { run: RunSummary; group: GroupDetail }) {
  const [at, setAt] = useState(0);
  const move = (by: number) => {
    const next = Math.max(0, Math.min(group.episodes.length - 1, at + by));
    setAt(next);
    document.getElementById(`member-${next}`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  const selected = group.episodes[at];
  useKeys([
    { keys: ["j", "ArrowRight", "l"], help: "next episode", run: () => move(1) },
    { keys: ["k", "ArrowLeft", "h"], help: "previous episode", run: () => move(-1) },
    {
      keys: ["Enter", "o"], help: "open the episode",
      run: () => {
        if (selected) location.hash = episodeLink(run.id, selected.row);
      },
    },
  ]);
  const most = Math.max(...group.episodes.map((one) => Math.abs(one.row.reward ?? 0)), 1e-9);
  const common = group.num_common_messages;
  return (
    <>
      <div class="head">
        <h1>
          <Inline text={group.task_id || group.group_id} limit={160} />
        </h1>
        <span class="muted">step {group.step}</span>
      </div>
      <Problems problems={group.problems} />
      <Facts
        facts={[
          ["episodes", number(group.episodes.length)],
          ["mean reward", number(group.reward_mean, 3)],
          ["deviation", number(group.reward_std, 3)],
          ["alike at first", group.num_common_tokens === null ? count(common, "message") : `${count(common, "message")}, ${count(group.num_common_tokens, "token")}`],
        ]}
      />
      {group.reward_std === 0 && (
        <ul class="notes">
          <li>All rewards are alike: a baseline of the group leaves nothing to learn from it.</li>
        </ul>
      )}
      {common > 0 && group.episodes[0] && (
        <details class="shared">
          <summary>What all begin with: {count(common, "message")}</summary>
          {group.episodes[0].messages.slice(0, common).map((message) => (
            <MessageView key={message.index} message={message} />
          ))}
        </details>
      )}
      <div class="columns" tabIndex={0} role="region" aria-label="Episodes of the group">
        {group.episodes.map((member, index) => (
          <Member key={member.row.episode_id} run={run} member={member} index={index} common={common} most={most} selected={index === at} />
        ))}
      </div>
    </>
  );
}

function Member(props: { run: RunSummary; member: GroupMember; index: number; common: number; most: number; selected: boolean }) {
  const { member, index, common } = props;
  const { row } = member;
  const reward = row.reward ?? 0;
  return (
    <section class={`column panel${props.selected ? " selected" : ""}`} id={`member-${index}`} aria-label={`Episode ${index + 1}`}>
      <header>
        <a href={episodeLink(props.run.id, row)}>Episode {index + 1}</a> <OutcomeChip row={row} />
        <div class="reward-bar" aria-hidden="true">
          <span class={reward < 0 ? "minus" : ""} style={{ width: `${(100 * Math.abs(reward)) / props.most}%` }} />
        </div>
        <div>
          reward <b>{number(row.reward, 3)}</b>, advantage{" "}
          <b>
            <Signed value={row.advantage} />
          </b>
        </div>
        <div class="muted">
          {count(row.num_turns, "turn")}, {count(row.num_tool_calls, "tool call")}
          {row.num_tool_errors > 0 && `, ${count(row.num_tool_errors, "error")}`}
          {row.dropped !== null && (
            <>
              , dropped: <Inline text={row.dropped} />
            </>
          )}
        </div>
      </header>
      {member.messages.slice(common).map((message) => (
        <>
          {message.index === member.parts_at_message && (
            <p class="parting">
              Parts from episode 1 here
              {member.parts_at_token !== null && (
                <>
                  , at{" "}
                  <a href={episodeLink(props.run.id, row, { tab: "tokens", token: member.parts_at_token })}>token {number(member.parts_at_token)}</a>
                </>
              )}
            </p>
          )}
          <MessageView key={message.index} message={message} />
        </>
      ))}
      {member.messages.length <= common && <p class="muted">Nothing more than all begin with.</p>}
    </section>
  );
}
