// Package iptables keeps pods away from the instance metadata endpoint, 169.254.169.254 and fd00:ec2::254, and brings their
// requests to imdsgate instead. It is the only importer of go-iptables and netlink.
//
// # Two locks
//
// Behind the endpoint are the credentials of the node. Whatever opens a way there for one packet gives them to a pod, so two
// mechanisms that share nothing keep it shut, and each is tested with the other one removed.
//
// The guard is three policy-routing rules a family, made by netlink alone:
//
//	0: to 169.254.169.254 iif lo   goto 1         what the node itself sends goes on as before
//	0: to 169.254.169.254          unreachable    everybody else's packet is refused
//	1: nop
//
// Routing sees the destination after DNAT: what the redirect took passes, and what escaped it is refused: flushed rules,
// connections older than them, UDP, ICMP, other ports, an interface that the redirect does not match. Priority 0 because the
// Amazon VPC CNI has rules at 1 and 10.
//
// The redirect is an own chain, IMDSGATE, in two tables of iptables. In nat it sends TCP port 80 of the endpoint to the node's
// own address and imdsgate's port; what the node itself sends never passes PREROUTING, so no interface need be named. In filter it
// lets connections to that port pass only if their first destination was the endpoint, so that nobody reaches the port directly.
//
// # Rules, each with its test
//
//   - Fail closed: nothing is ever removed but by Remove. A run that ends, crashes or fails leaves both locks
//     (TestKernelErrorsNameTheFix). The guard comes first and needs no iptables binary.
//   - Order: nop, goto, unreachable, and backwards for a removal. A goto without target, or behind unreachable, would cut the node
//     itself off. From any state and at every step the node keeps the endpoint if it has it, and pods that are kept from it stay so
//     (TestPlanGuardHoldsAtEveryStep, TestKernelGuardSteps).
//   - It holds whatever other routing rules there are, before or behind `local`, with strict reverse path filtering
//     (TestKernelForeignRoutingRules). What beats it is named by Check.
//   - A refused pod is told so: at once, and a second later by TCP over IPv6 (TestKernelRefusalIsTold). Linux sends one source five
//     such messages and then one a second; to who asks more often the endpoint is silent.
//   - The chains hold exactly our rules and one plain jump, ahead of all others, leads to them (TestDefects); anything else is put
//     right by one commit a table, filter before nat, so the port is locked before anything leads to it (TestRestoreGolden).
//   - Connections from before the rules are cut, the node's own and those to imdsgate are not (TestKernelRedirect,
//     TestEscapedConnections).
//   - Repair is by event: routing rules, links, addresses and nftables; the legacy back end has no events and waits for the interval
//     of 30 s. The guard is looked at every 100 ms at most, the redirect once a second (TestKernelRepairNFT, TestKernelRepairLegacy,
//     TestLoopCoalesces, TestEventsAboutUs).
//   - An agent that insists on the first place is reported and put behind three times, then once in 30 s, not fought
//     (TestKernelRepairNFT).
//   - One instance at a time repairs: who took ownership last. The change of target loses no connection, and the port of the
//     instance before stays locked (TestKernelHandover, TestOwnership). What conntrack keeps of connections to that one is deleted
//     within a second of its last socket, or the next pod with the same IP and port would be led there (TestKernelHandoverEnds).
//   - The redirect that an earlier run made with the other back end goes, once this one's is there (TestKernelOtherBackend).
//   - A held xtables lock is waited for, never fatal, and outlasts no context (TestKernelLockHeld).
//   - Foreign rules are never touched, and our routing rules are removed on a full match only (TestKernelRedirect,
//     TestOnlyFullMatchesAreOurs). Remove leaves every table and rule as it was before.
//
// # What neither covers
//
// Pods in the host network are the node, and so is what they proxy. So is the kubelet: a probe or lifecycle handler with host:
// 169.254.169.254. Data paths that skip routing rules: flowtable offload, eBPF redirection, a network interface of the pod's own.
// A neighbour that spoofs ARP on a bridge with NET_RAW. Pods with NET_ADMIN in the host's namespace. The time on a new node before
// the guard is first made, unless a unit makes it at boot, with the tag of RuleProtocol (TestKernelBootUnit):
//
//	ip rule add pref 1 nop protocol 169
//	ip rule add pref 0 to 169.254.169.254 iif lo goto 1 protocol 169
//	ip rule add pref 0 to 169.254.169.254 unreachable protocol 169
//
// and the same with `ip -6` and fd00:ec2::254. The floor under all this: IMDSv2 required, hop limit 1, IPv6 endpoint off.
package iptables
