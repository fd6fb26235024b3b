// Package scenarios judges imdsgate where it is used: as a DaemonSet, installed from its chart, under real kubelets. Its tests
// share one cluster: node 1 has the bridge CNI and kube-proxy's iptables mode, node 2 the ptp CNI and the nftables mode.
//
// After every scenario the stand-in of the real metadata endpoint is asked: no packet of a pod has reached it, and every request
// of a node was one that the daemon builds. A scenario that opens the endpoint says so (breach).
//
// TestScenarioHostile… are attacks of package hostile from inside containers. What the kernel alone decides is judged there.
package scenarios
