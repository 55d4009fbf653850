// Values in words. Pure.

export function duration(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "";
  if (seconds < 1) return `${Math.max(0, Math.round(seconds * 1000))} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// A guess has no seconds where it has minutes.
export function about(seconds) {
  if (seconds < 10) return "a few seconds";
  if (seconds < 90) return `about ${Math.round(seconds / 5) * 5} s`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} min`;
  return `about ${(seconds / 3600).toFixed(1)} h`;
}

// "15:04" today, with the date before that.
export function clock(milliseconds) {
  if (milliseconds == null) return "";
  const then = new Date(milliseconds);
  const today = then.toDateString() === new Date().toDateString();
  const time = { hour: "2-digit", minute: "2-digit" };
  return then.toLocaleString([], today ? time : { month: "short", day: "numeric", ...time });
}

export function bytes(count) {
  if (count == null) return "";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${count.toFixed(count < 10 && power ? 1 : 0)} ${units[power]}`;
}

export function gibibytes(mebibytes) {
  return (mebibytes / 1024).toFixed(1);
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

// What a person calls a workflow: the name it was handed in with, else the end of its id (the beginning is the time).
export function nameOf(row) {
  const name = row.metadata?.name;
  return typeof name === "string" && name ? name : row.workflowId.slice(-8);
}

export const STATUS = {
  queued: "waiting",
  running: "running",
  completed: "completed",
  failed: "failed",
  cancelled: "cancelled",
};
