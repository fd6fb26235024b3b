package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
)

// backend is the iptables command of one family: the one that PATH offers, or explicitly nft's or legacy's.
type backend struct {
	family  family
	command string // iptables, iptables-nft, ip6tables-legacy, …
	mode    string // nf_tables or legacy
	ipt     *goiptables.IPTables
}

// commandOf names the command of a back end: "", "nft" or "legacy".
func commandOf(f family, kind string) string {
	if kind == "" {
		return f.command()
	}
	return f.command() + "-" + kind
}

// probe finds the command. It touches no table.
func probe(ctx context.Context, f family, command string) (*backend, error) {
	proto := goiptables.ProtocolIPv4
	if f == ipv6 {
		proto = goiptables.ProtocolIPv6
	}
	for _, c := range []string{command, command + "-restore"} {
		if _, err := exec.LookPath(c); err != nil {
			return nil, fmt.Errorf("find %s: %w: install it (Debian: apt-get install iptables), or use -redirect none", c, err)
		}
	}
	// A second at a time for the xtables lock, so that a held one cannot outlast ctx: listing again is up to list.
	ipt, err := goiptables.New(goiptables.Path(command), goiptables.IPFamily(proto), goiptables.Timeout(1))
	if err != nil {
		return nil, fmt.Errorf("probe %s: %w", command, err)
	}
	out, err := exec.CommandContext(ctx, command, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("probe %s: %w", command, err)
	}
	b := &backend{family: f, command: command, mode: "legacy", ipt: ipt}
	if bytes.Contains(out, []byte("nf_tables")) {
		b.mode = "nf_tables"
	}
	return b, nil
}

// list reads the parent's rules and our chain, no more.
func (b *backend) list(ctx context.Context, t table) (listing, error) {
	parent, err := b.rules(ctx, t.name, t.parent)
	if err != nil {
		return listing{}, b.hint("list", err)
	}
	l := listing{parent: parent}
	l.chain, err = b.rules(ctx, t.name, chainName)
	var e *goiptables.Error
	switch {
	case err == nil:
		l.exists = true
	case errors.As(err, &e) && e.ExitStatus() == 1: // every version words it differently
	default:
		return listing{}, b.hint("list", err)
	}
	return l, nil
}

// rules lists a chain. It waits for the xtables lock as long as ctx allows.
func (b *backend) rules(ctx context.Context, table, chain string) ([]string, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		lines, err := b.ipt.List(table, chain)
		if err != nil && strings.Contains(err.Error(), "xtables lock") {
			continue // it has waited for a second
		}
		return onlyRules(lines), err
	}
}

// dump lists every rule of a table.
func (b *backend) dump(ctx context.Context, table string) ([]string, error) {
	out, err := exec.CommandContext(ctx, b.command+"-save", "-t", table).Output() //nolint:gosec // one of our own names
	if err != nil {
		return nil, b.hint("save", err)
	}
	return onlyRules(strings.Split(string(out), "\n")), nil
}

func onlyRules(lines []string) []string {
	return slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "-A ") })
}

// restore commits the lines, one atomic change a table. It waits for the xtables lock; when ctx ends it is killed, before
// or after a commit.
func (b *backend) restore(ctx context.Context, lines string) error {
	if lines == "" {
		return nil
	}
	cmd := exec.CommandContext(ctx, b.command+"-restore", "--noflush", "--wait") //nolint:gosec // one of our own names
	cmd.Stdin = strings.NewReader(lines)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s-restore: %w", b.command, ctx.Err())
	}
	return b.hint("restore", fmt.Errorf("%w: %s", err, bytes.TrimSpace(out)))
}

// hint adds the likely fix to an error of the command.
func (b *backend) hint(op string, err error) error {
	text, fix := err.Error(), ""
	switch {
	case strings.Contains(text, "Permission denied"), strings.Contains(text, "you must be root"), strings.Contains(text, "Operation not permitted"):
		fix = ": give the container the capabilities NET_ADMIN and NET_RAW"
	case strings.Contains(text, "lock file"):
		fix = ": mount /run/xtables.lock from the node"
	case strings.Contains(text, "do you need to insmod"), strings.Contains(text, "missing kernel module"):
		fix = ": the node's kernel lacks modules of this back end: load them (nf_nat, nf_conntrack, xt_conntrack, xt_comment, ipt_REJECT) or use the other back end"
	}
	return fmt.Errorf("%s %s (%s): %w%s", op, b.command, b.mode, err, fix)
}

// backends returns every back end that may hold rules of ours: for a removal, and to see foreign ones. The legacy tables are
// looked at only where they exist, because looking would create them.
func backends(ctx context.Context, f family) []*backend {
	var found []*backend
	seen := map[string]bool{}
	for _, kind := range []string{"nft", "legacy", ""} {
		b, err := probe(ctx, f, commandOf(f, kind))
		if err != nil || seen[b.mode] {
			continue
		}
		seen[b.mode] = true
		if names, err := os.ReadFile(f.legacyTables()); b.mode == "legacy" && (errors.Is(err, os.ErrNotExist) || err == nil && len(names) == 0) {
			continue
		}
		found = append(found, b)
	}
	return found
}
