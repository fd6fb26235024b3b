package faults

// entry is a fault of the table.
type entry struct {
	name string
	// how it is made to happen. %s is how long it lasts, where that differs.
	how string
	// long: only FAULTS=long has it. Otherwise it is part of every run.
	long bool
}

// catalogue is the order of the table.
var catalogue = []entry{
	{name: "STS slow", how: "the stand-in for AWS holds every AssumeRole for 10 s, for %s"},
	{name: "STS throttles", how: "it answers Throttling, for %s"},
	{name: "STS 5xx", how: "it answers 503, for %s"},
	{name: "STS dead", how: "nobody listens at its address, for %s"},
	{name: "STS dead for 45 minutes", how: "time compressed twelve times: sessions of 5 min instead of 1 h, dead for 225 s instead of 45 min, from the moment of issue", long: true},
	{name: "STS dead for longer than a session", how: "the same outage goes on until a minute before the sessions of 5 min expire, and 20 s more", long: true},
	{name: "API server dead", how: "kube-apiserver killed, started again after %s"},
	{name: "watch expired (410)", how: "kube-apiserver killed, etcd compacted to its newest revision, kube-apiserver started", long: true},
	{name: "etcd restarted", how: "etcd killed, started again after 5 s", long: true},
	{name: "in-cluster token rotated", how: "a new token beside the old one as kubelet does it, the old one revoked, every connection to the API server cut", long: true},
	{name: "daemon killed", how: "SIGKILL"},
	{name: "daemon stopped for 30 s", how: "SIGSTOP, SIGCONT after 30 s", long: true},
	{name: "daemon hangs", how: "SIGSTOP; the liveness probe finds it", long: true},
	{name: "daemon out of memory", how: "memory limit of its cgroup lowered to what it uses, 8 MiB more asked for", long: true},
	{name: "iptables -F", how: "iptables -t nat -F; iptables -F"},
	{name: "nft flush ruleset", how: "nft flush ruleset: every table of every agent"},
	{name: "chain edited", how: "a rule in front of ours in our own nat chain, and our chain of filter emptied"},
	{name: "jump displaced", how: "another agent's jump in front of ours"},
	{name: "endpoint taken", how: "another agent's DNAT of the endpoint in front of ours, to a port where nobody listens"},
	{name: "firewall reloaded", how: "as firewalld does: everything flushed, all rules but ours restored"},
	{name: "ip rule flush", how: "ip rule flush, then the kernel's own rules again"},
	{name: "guard deleted", how: "the guard's three rules deleted one by one"},
	{name: "xtables lock held, nft", how: "flock /run/xtables.lock for 30 s, and iptables -t nat -F meanwhile", long: true},
	{name: "iptables-legacy -F", how: "back end legacy: iptables-legacy -t nat -F; iptables-legacy -F. No events: found at the interval of 30 s", long: true},
	{name: "xtables lock held, legacy", how: "back end legacy: flush, and the xtables lock held for 30 s from then on", long: true},
	{name: "address added", how: "another address on the node's interface, and away again after 3 s"},
	{name: "node address lost", how: "the address that pods are sent to is taken from the node for 5 s", long: true},
	{name: "pod bridge recreated", how: "cni0 deleted, made anew with its address, the pods' interfaces put back", long: true},
	{name: "clock 2 h ahead", how: "the daemon's wall clock jumps ahead by 2 h for 40 s (its Go runtime adds it; nothing else on the machine changes its time)", long: true},
	{name: "clock 2 h behind", how: "the same, back by 2 h", long: true},
	{name: "state corrupted", how: "every file of the state directory overwritten with noise, daemon killed"},
	{name: "state truncated", how: "every file of the state directory cut to nothing, daemon killed", long: true},
	{name: "disk full", how: "the state directory on a tmpfs without a free byte", long: true},
	{name: "disk full, daemon killed", how: "the same, and SIGKILL", long: true},
	{name: "state directory read-only", how: "remounted read-only", long: true},
	{name: "state directory read-only, daemon killed", how: "the same, and SIGKILL; writable again after 20 s", long: true},
}
