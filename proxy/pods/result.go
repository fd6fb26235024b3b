package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Bounds of one CNI result. Only root writes them, but a broken plugin must not fill our memory either.
const (
	maxResultSize = 256 << 10 // bytes of the file
	maxResultIPs  = 32
	maxResultName = 253 // of a pod, its namespace, its UID: the longest that the API permits
)

// result is what a CNI result file says: a sandbox of this pod has these addresses.
type result struct {
	namespace, name string
	uid             string // as the kubelet knows it: of a static pod not that of its mirror
	network, ifName string
	ips             []netip.Addr
}

// equal says whether two results say the same.
func (r *result) equal(s *result) bool {
	return r.namespace == s.namespace && r.name == s.name && r.uid == s.uid && r.network == s.network && r.ifName == s.ifName &&
		slices.Equal(r.ips, s.ips)
}

// errNotOurs is about files that are in order and not a pod's.
var errNotOurs = errors.New("not the CNI result of a pod")

// parseResult reads a file of libcni's cache (cniCacheV1) with the given name, its result in any version of the CNI
// specification. It is total: the file may hold anything. Its error is errNotOurs or says what is wrong.
func parseResult(file string, data []byte) (*result, error) {
	var cached struct {
		Kind        string      `json:"kind"`
		ContainerID string      `json:"containerId"`
		IfName      string      `json:"ifName"`
		NetworkName string      `json:"networkName"`
		Args        [][2]string `json:"cniArgs"`
		Result      struct {
			Interfaces []struct {
				Sandbox string `json:"sandbox"`
			} `json:"interfaces"`
			IPs []struct { // since 0.3.0
				Interface *int   `json:"interface"`
				Address   string `json:"address"`
			} `json:"ips"`
			IP4, IP6 struct { // up to 0.2.0
				IP string `json:"ip"`
			}
		} `json:"result"`
	}
	if err := json.Unmarshal(data, &cached); err != nil {
		return nil, fmt.Errorf("not JSON, or not libcni's: %w", err)
	}
	if cached.Kind != "cniCacheV1" {
		return nil, errNotOurs
	}
	if file != cached.NetworkName+"-"+cached.ContainerID+"-"+cached.IfName {
		return nil, errors.New("its name is not that of its content: a copy?")
	}
	r := &result{network: cached.NetworkName, ifName: cached.IfName}
	for _, arg := range cached.Args {
		var field *string
		switch arg[0] {
		case "K8S_POD_NAMESPACE":
			field = &r.namespace
		case "K8S_POD_NAME":
			field = &r.name
		case "K8S_POD_UID":
			field = &r.uid
		default:
			continue
		}
		if len(arg[1]) > maxResultName || *field != "" && *field != arg[1] { // Multus repeats the arguments; they must agree
			return nil, fmt.Errorf("argument %s is too long or contradicts itself", arg[0])
		}
		*field = arg[1]
	}
	if r.namespace == "" || r.name == "" || r.uid == "" {
		return nil, errNotOurs
	}
	add := func(text string) error {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("address %.64q: %w", text, err)
		}
		ip := prefix.Addr().Unmap()
		// Every sandbox has these. IPv4's link-local ones are pods' own: EKS gives pods of IPv6 clusters 169.254.172.0/22.
		if ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() || ip.Is6() && ip.IsLinkLocalUnicast() || slices.Contains(r.ips, ip) {
			return nil
		}
		if len(r.ips) == maxResultIPs {
			return fmt.Errorf("more than %d addresses", maxResultIPs)
		}
		r.ips = append(r.ips, ip)
		return nil
	}
	for _, ip := range cached.Result.IPs {
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(cached.Result.Interfaces) && cached.Result.Interfaces[*i].Sandbox == "" {
			continue // of the node's end of the link, not of the pod's
		}
		if err := add(ip.Address); err != nil {
			return nil, err
		}
	}
	for _, text := range []string{cached.Result.IP4.IP, cached.Result.IP6.IP} {
		if text == "" {
			continue
		}
		if err := add(text); err != nil {
			return nil, err
		}
	}
	return r, nil
}
