/**
 * Text that a model or a tool wrote, which may be anything, shown as text.
 *
 * What steers a terminal or the direction of writing, and what cannot be seen, becomes a mark that says its name; each
 * text is isolated, so that its direction ends with it; long texts are folded. Markup is never made of it: all goes into
 * text nodes.
 */

import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";

const NAMES: Record<number, string> = {
  0x7f: "DEL", 0xad: "SHY", 0x61c: "ALM", 0x115f: "HCF", 0x1160: "HJF", 0x180e: "MVS", 0x200b: "ZWSP", 0x200c: "ZWNJ",
  0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LSEP", 0x2029: "PSEP", 0x202a: "LRE", 0x202b: "RLE",
  0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
  0x3164: "HF", 0xfeff: "BOM", 0xffa0: "HHF",
};
const C0 = "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split(" ");

// Controls but tab and newline; format characters; halves of surrogate pairs; fillers that draw nothing; private use.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ue000-\uf8ff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\udb40[\udc00-\udfff]/g;
// More than so many combining marks on one letter draw over the lines around.
const PILE = /(\p{M}{4})(\p{M}+)/gu;

function withoutPiles(text: string): string {
  return text.replace(PILE, (_, kept: string, rest: string) => `${kept}⟨${[...rest].length} more marks⟩`);
}

function nameOf(character: string): string {
  const code = character.codePointAt(0) ?? 0;
  return C0[code] ?? NAMES[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** The text in one run, hidden characters by their names: for attributes, where no element can stand. */
export function plain(text: string): string {
  return withoutPiles(text).replace(HIDDEN, (character) => `⟨${nameOf(character)}⟩`);
}

function withMarks(text: string): ComponentChildren[] {
  const parts: ComponentChildren[] = [];
  let from = 0;
  const source = withoutPiles(text.replace(/\r\n/g, "\n"));
  for (const match of source.matchAll(HIDDEN)) {
    if (match.index > from) parts.push(source.slice(from, match.index));
    const code = (match[0].codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(
      <span class="mark" title={`U+${code}`}>
        {nameOf(match[0])}
      </span>,
    );
    from = match.index + match[0].length;
  }
  parts.push(source.slice(from));
  return parts;
}

/** One line of foreign text in a sentence or a cell. */
export function Inline({ text, limit = 300 }: { text: string; limit?: number }) {
  return <bdi class="foreign-inline">{withMarks(text.length > limit ? `${text.slice(0, limit)}…` : text)}</bdi>;
}

const FIRST = 2000;
const FIRST_LINES = 40;
const MORE = 40000;

function firstPart(text: string): number {
  let at = -1;
  for (let line = 0; line < FIRST_LINES; line++) {
    at = text.indexOf("\n", at + 1);
    if (at < 0 || at > FIRST) return Math.min(text.length, FIRST);
  }
  return at;
}

/** Whole foreign text, folded where it is long. */
export function Foreign({ text, mono = false, label }: { text: string; mono?: boolean; label?: string }) {
  const start = firstPart(text);
  const [shown, setShown] = useState(start);
  const end = Math.max(shown, start);
  // Half a character is not cut off.
  const cut = end < text.length && /[\ud800-\udbff]/.test(text[end - 1] ?? "") ? end + 1 : end;
  const rest = text.length - cut;
  return (
    <div class="foreign-block">
      <div class={mono ? "foreign mono" : "foreign"} dir="auto" aria-label={label} role={label ? "group" : undefined}>
        {withMarks(text.slice(0, cut))}
      </div>
      {rest > 0 && (
        <button type="button" class="quiet" onClick={() => setShown(cut + MORE)}>
          {rest > MORE ? `Show ${MORE.toLocaleString("en-US")} more of` : "Show the other"}{" "}
          {rest.toLocaleString("en-US")} characters
        </button>
      )}
      {rest <= 0 && cut > start && (
        <button type="button" class="quiet" onClick={() => setShown(0)}>
          Fold
        </button>
      )}
    </div>
  );
}
