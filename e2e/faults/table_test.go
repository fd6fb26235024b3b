package faults

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

const head = `# Faults

What pods see when something breaks. Written by ` + "`%s`" + ` (e2e/faults, which says how each fault is made), not by hand.

Machine: %s. Date: %s. Two nodes of a real cluster: node 1 with the bridge CNI and kube-proxy in iptables mode, node 2 with ptp and
nftables. Two pods with a role each on either node begin %d full sequences a second, token, role list, document, every request with
a limit of 1 s and none tried twice, half of the sequences with a connection for each request.

*Whole again* is when every pod is served, the node's rules are what they were, and what the fault held up (a new pod, a session) is
done; it counts from the end of a fault that lasts, else from its beginning. *Gap* is the longest time that any pod went without
credentials. *Failed* are sequences of pods for which the daemon held valid credentials, and why; a failure without such a reason
fails the suite. In no row did any pod see credentials of the node, of another pod or expired ones, and in none did a packet of a pod
reach the real endpoint: that fails the suite too.

| fault | pods of these nodes saw | gap | whole again | failed although cached | node's, foreign, expired credentials |
|---|---|---|---|---|---|
`

func (r *report) markdown() string {
	var b strings.Builder
	command := "make test-cluster"
	if r.Long {
		command = "make test-faults"
	}
	fmt.Fprintf(&b, head, command, r.Machine, r.Date, 2*2*int(workers*1000/interval.Milliseconds()))
	for _, row := range r.Rows {
		failed := "0"
		if row.Failed > 0 {
			failed = fmt.Sprintf("%d: %s", row.Failed, row.Why)
		}
		var answers []string
		for _, kind := range slices.Sorted(maps.Keys(row.Answers)) {
			answers = append(answers, fmt.Sprintf("%d %s", row.Answers[kind], kind))
		}
		fmt.Fprintf(&b, "| **%s**: %s | %s: %s | %s | %s after %s%s | %s | %d, %d, %d |\n", row.Fault, row.How, nodes(row.Nodes),
			strings.Join(answers, ", "), seconds(row.LongestGap), seconds(row.Whole), row.Since, notes(row.Notes), failed, row.Node, row.Foreign, row.Expired)
	}
	var missing []string
	for _, e := range catalogue {
		if !slices.ContainsFunc(r.Rows, func(x row) bool { return x.Fault == e.name }) {
			missing = append(missing, fmt.Sprintf("* **%s**: %s\n", e.name, strings.ReplaceAll(e.how, ", for %s", "")))
		}
	}
	if len(missing) > 0 {
		fmt.Fprintf(&b, "\nNot in these runs:\n\n%s", strings.Join(missing, ""))
	}
	return b.String()
}

func nodes(n []int) string {
	if len(n) == 1 {
		return fmt.Sprintf("node %d", n[0])
	}
	return "both"
}

func notes(n []string) string {
	if len(n) == 0 {
		return ""
	}
	return "; " + strings.Join(n, "; ")
}

func seconds(s float64) string {
	if s >= 10 {
		return fmt.Sprintf("%.0f s", s)
	}
	return fmt.Sprintf("%.1f s", s)
}
