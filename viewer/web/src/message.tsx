/** One message of an episode: thinking folded, calls with their arguments, results as their environment draws them. */

import type { ComponentChildren } from "preact";

import type { ShownCall, ShownMessage } from "./api";
import { BlockView } from "./blocks";
import { number } from "./format";
import { Foreign, Inline } from "./visible_text";

interface Props {
  message: ShownMessage;
  selected?: boolean;
  id?: string;
  /** At the end of the head, such as a reward. */
  aside?: ComponentChildren;
  onSelect?: () => void;
}

export function MessageView({ message, selected = false, id, aside, onSelect }: Props) {
  const kind = message.is_error ? "error" : ["assistant", "tool", "user", "system"].includes(message.role) ? message.role : "";
  const folded = message.role === "system" && message.text.length > 600;
  return (
    <article
      id={id} class={`message ${kind}${selected ? " selected" : ""}`} tabIndex={id ? -1 : undefined}
      aria-label={`${message.role} message ${message.index}`} onClick={onSelect}
    >
      <header>
        <span class="role">
          <Inline text={message.role} />
        </span>
        {message.name && <Inline text={message.name} />}
        {message.turn !== null && <span>turn {message.turn}</span>}
        {message.is_error && <span class="chip bad">error</span>}
        <span class="push">{aside}</span>
      </header>
      {message.thinking !== null && (
        <details class="thinking">
          <summary>Thinking, {number(message.thinking.length + message.thinking_cut)} characters</summary>
          <Foreign text={message.thinking} />
          <Cut count={message.thinking_cut} />
        </details>
      )}
      {message.blocks.map((block, at) => (
        <BlockView key={at} block={block} />
      ))}
      {message.text !== "" &&
        (message.blocks.length || folded ? (
          <details>
            <summary>{message.blocks.length ? "As text" : `${number(message.text.length)} characters`}</summary>
            <Foreign text={message.text} mono={message.role === "tool"} />
          </details>
        ) : (
          <Foreign text={message.text} mono={message.role === "tool"} />
        ))}
      <Cut count={message.cut} />
      {message.calls.map((call, at) => (
        <CallView key={at} call={call} />
      ))}
      {message.text === "" && !message.calls.length && !message.blocks.length && message.thinking === null && <span class="muted">empty</span>}
    </article>
  );
}

function Cut({ count }: { count: number }) {
  return count > 0 ? <p class="muted">{number(count)} more characters are in the files.</p> : null;
}

function CallView({ call }: { call: ShownCall }) {
  const given = call.arguments;
  return (
    <div class="call">
      <span class="name">
        <Inline text={call.name} />
      </span>
      {given !== null && typeof given === "object" && !Array.isArray(given) ? (
        <dl class="arguments">
          {Object.entries(given).map(([name, value]) => (
            <ArgumentRow key={name} name={name} value={value} />
          ))}
        </dl>
      ) : (
        <Foreign text={typeof given === "string" ? given : (JSON.stringify(given) ?? "")} mono />
      )}
    </div>
  );
}

function ArgumentRow({ name, value }: { name: string; value: unknown }) {
  const text = typeof value === "string" ? value : (JSON.stringify(value, null, 1) ?? "");
  return (
    <>
      <dt>
        <Inline text={name} />
      </dt>
      <dd>
        <Foreign text={text} mono />
      </dd>
    </>
  );
}
